"""Is a training going well? Rules that read its figures and name what is wrong, without torch and Lightning."""
