"""PLACEHOLDER, to be overwritten."""

LOCK = "lock"


class TableLock:
    def __init__(self, table, run):
        pass

    def acquire(self):
        pass

    def release(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *e):
        pass
