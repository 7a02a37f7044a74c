"""The engines behind one gateway: where requests go, and which engines take some."""
