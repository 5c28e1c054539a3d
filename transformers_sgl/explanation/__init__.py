"""What both models saw and wrote for one question, as a page."""
