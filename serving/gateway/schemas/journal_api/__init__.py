"""What the routes of the journal take and answer."""
