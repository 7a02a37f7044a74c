"""Model folders that get_model makes: converted, random, downloaded."""
