"""Which structures a model has and how many of them go. Arithmetic on configs and counts; no weights here."""
