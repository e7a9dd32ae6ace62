"""What runs shards where: worker processes of this machine, a slurm array's tasks, Ray's."""
