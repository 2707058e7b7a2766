"""Train a network in two phases: the head on cached features, then every layer."""
