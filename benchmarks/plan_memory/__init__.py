"""What `tessera plan` says of memory, beside what runs really held."""
