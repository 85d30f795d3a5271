"""Do results work with other versions of the libraries that load them?"""
