"""The data contracts: Arrow schemas and the JSON records beside them. No logic beyond reading and comparing them."""
