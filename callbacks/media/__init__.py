"""Pictures of completions and benchmark answers, and how loggers take them."""
