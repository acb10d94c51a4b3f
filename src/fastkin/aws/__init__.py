"""One signed call: names, credentials, signatures, HTTP, what an answer means."""
