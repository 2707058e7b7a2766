"""Run the pipeline in one process, on all GPUs of this machine or on Ray, or retry failed rows."""
