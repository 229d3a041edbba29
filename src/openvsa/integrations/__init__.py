"""Ways into other libraries. Each module needs its own extra and is imported only when used."""
