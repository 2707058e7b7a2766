"""Find a bundle's temperature and triage thresholds from labelled images."""
