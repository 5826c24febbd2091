"""Adversarial attacks on decisions and on maps, and the detection of unusual inputs."""
