"""Writes the golden files of the present schema."""

from tests.golden.files import FOLDER, write

if __name__ == "__main__":
    for num_writers in (1, 2):
        write(FOLDER, num_writers=num_writers)
