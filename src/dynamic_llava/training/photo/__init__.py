"""What ``photo`` learns from: photographs through a frozen tower, whose output is computed once and kept."""
