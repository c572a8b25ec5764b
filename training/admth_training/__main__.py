"""``python -m admth_training`` is ``admth-train``."""

from admth_training.cli import main

main()
