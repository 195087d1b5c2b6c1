package phd

// #include "shim.h"
import "C"

// Version returns the library's version, such as "0.1.0".
func Version() string { return C.GoString(C.phd_version()) }

// ABIVersion returns a number that grows when the library's binary interface breaks.
func ABIVersion() uint32 { return uint32(C.phd_abi_version()) }
