"""``python -m admth_calibration`` is ``admth-calibrate``."""

from admth_calibration.cli import main

if __name__ == "__main__":
    main()
