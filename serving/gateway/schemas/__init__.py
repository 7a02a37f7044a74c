"""The requests and answers of each route, as msgspec structs: what is checked is what the OpenAPI document says."""
