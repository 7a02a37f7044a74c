"""What a client and an engine say to each other: plain data and bytes."""
