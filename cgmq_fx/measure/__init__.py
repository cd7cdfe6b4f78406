"""Cost tables from measurements: times operations in a runtime, fits what was not timed."""
