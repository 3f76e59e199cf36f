"""What memory and time a training will take, before anything is downloaded: the trainer's own code without weights."""
