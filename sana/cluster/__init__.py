"""Many pictures on many devices, by Ray."""
