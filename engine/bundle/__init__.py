"""Load the model folder: its description, its compiled plans and its operating points, each checked."""
