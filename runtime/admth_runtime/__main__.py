"""``python -m admth_runtime`` is ``admth-run``."""

from admth_runtime.cli import main

if __name__ == "__main__":
    main()
