"""The paths that the server answers, by whom they are for."""
