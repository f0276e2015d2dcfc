"""One op a file: reference, Triton kernel, launchers, public function."""
