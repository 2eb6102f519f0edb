"""Many runs compared, one network's mistakes, and their plots."""
