"""Run the pipeline in one process, on all GPUs of this machine, on Ray, or again for failed rows."""
