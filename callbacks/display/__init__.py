"""The run on the terminal: a panel at the start, a bar or lines while it goes on, a summary at the end."""
