"""From requests to trained edits: encoding, gate initialisation, the engines and the bank."""
