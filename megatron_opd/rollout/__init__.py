"""Who answers the training prompts: the student, the data set, a teacher, or student and teacher mixed."""
