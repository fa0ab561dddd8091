"""What `tessera doctor` looks at, one file per question."""
