"""Everything that touches a stock model, inside a `with`."""
