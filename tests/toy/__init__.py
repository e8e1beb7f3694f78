"""A family of its own, outside the package: one folder, known to bevqat by an entry point alone (`conftest.py` here)."""
