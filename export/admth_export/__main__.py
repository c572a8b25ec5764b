"""``python -m admth_export`` is ``admth-export``."""

from admth_export.cli import main

if __name__ == "__main__":
    main()
