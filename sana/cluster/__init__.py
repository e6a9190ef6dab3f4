"""Many pictures on many devices, by Ray. Nothing else imports this."""
