"""Files: reading, recognising, renaming, filling, describing and writing them."""
