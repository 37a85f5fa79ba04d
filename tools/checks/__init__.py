"""What `microserve doctor` looks at: each check is given what it looks at, and returns what it found."""
