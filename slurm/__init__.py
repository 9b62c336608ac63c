"""Batch scripts for SLURM; train.sbatch is also what 'nemodiff launch' prints."""
