"""The gradient monitor in the trainers of others. Only here are the libraries that these modules are named for."""
