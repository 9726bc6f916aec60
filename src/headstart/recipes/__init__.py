"""The tutorials' experiments, done right: each file calls the public interface and nothing else."""
