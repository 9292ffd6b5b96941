"""A cluster of real servers on one machine: hosts, a network between them, and what runs there."""
