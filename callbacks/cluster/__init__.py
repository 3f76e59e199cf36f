"""Runs that share machines: a rank that died, a job that is taken away, checkpoints on disks that nodes share."""
