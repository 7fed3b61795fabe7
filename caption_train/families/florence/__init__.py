"""The Florence-2 family: encoding, answers with boxes, and conversion of Microsoft's checkpoints."""
