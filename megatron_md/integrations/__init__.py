"""Our objective, schedules, data and head inside other trainers."""
