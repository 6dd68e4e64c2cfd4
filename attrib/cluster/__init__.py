"""Many processes: arrays of Slurm tasks, submitted or as a plain script, and torchrun's ranks on one machine."""
