"""`observe-r1 ladder build`: difficulty by real rollouts, through Lightning's Trainer."""
