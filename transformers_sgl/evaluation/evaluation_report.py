"""Placeholder while the run is tried."""


def check_packages() -> None:
    """Nothing yet."""
