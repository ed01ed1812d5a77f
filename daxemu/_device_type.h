/* The Python type over _device.h, and the way from its objects to what is within. Include Python.h first. */
#ifndef ONECOPY_DEVICE_TYPE_H
#define ONECOPY_DEVICE_TYPE_H

#include "_device.h"

int device_type_add(PyObject *module); /* 0, or -1 with an exception */
/* The device within a `_fault.Device`, valid as long as the object; NULL with a TypeError for anything else. */
struct device *device_of(PyObject *object);

#endif
