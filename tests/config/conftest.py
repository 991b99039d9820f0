import pytest


@pytest.fixture
def write(tmp_path):
    """Write a config file, return its path."""

    def write(text: str | bytes, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write
